"""The loop: when it stops, what it keeps, and how it goes on after it was cut off."""
