"""The parts of a run around the update: credit, evaluation, alarms, stops."""
