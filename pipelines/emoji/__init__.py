"""Small text-to-image models of emoji: their data, their networks, their training."""
