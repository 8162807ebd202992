"""Hints: what a ControlNet reads, made from photographs, keypoints, depth and label maps. numpy and Pillow alone."""
