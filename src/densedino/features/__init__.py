"""Tokens as users meet them: extracted, kept, shown."""
