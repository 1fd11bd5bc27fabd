"""How a backbone is run; every engine gives the same tokens."""
