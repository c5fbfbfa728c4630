"""What each part costs beside what a user would run instead, and beside what the hardware allows: `python -m bench`."""
