"""What training brings back to a speech encoder with few neurons."""
