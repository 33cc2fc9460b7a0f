"""`trimtab generate`: from a request on the command line to pictures that carry how they were made."""
