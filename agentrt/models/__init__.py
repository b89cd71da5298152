"""Model architectures, by the name that their config gives."""
