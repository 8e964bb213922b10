"""The storage port and its implementations: named bytes, and no idea of what they mean."""
