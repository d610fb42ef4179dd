"""What one epoch and one run do around the update: credit, evaluation, alarms, stops."""
