"""What training brings back to a vision transformer with few neurons."""
