"""What a run needs in memory, predicted and measured."""
