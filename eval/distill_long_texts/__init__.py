"""What training brings back to a reader of long texts with few neurons."""
