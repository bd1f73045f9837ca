"""The commands, tested as a user meets them."""
