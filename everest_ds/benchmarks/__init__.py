"""What the project claims of itself, measured by the commands that users run."""
