"""What is settled before the first step."""
