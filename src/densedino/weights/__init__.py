"""From a name to a verified file to a strictly loaded module."""
