"""What the scripts need and a learner may skip, one topic per module."""
