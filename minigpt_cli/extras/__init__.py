"""What stands beside the core and may be lifted out. May import the core; the core never imports it."""
