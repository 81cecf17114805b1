"""What is done to a set of videos before training: looking at every file, and copies that are good to train on.

Nothing here loads torch: a worker process costs what PyAV and the frame reader cost.
"""
