"""What trimtab's conformance kit needs to know of these plug-ins: nothing, their defaults will do."""
