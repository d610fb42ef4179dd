"""Objects in pictures: detectors, their colours, and the GenEval rule over what they find."""
