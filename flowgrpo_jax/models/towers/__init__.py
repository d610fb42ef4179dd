"""Networks of reward models: CLIP, BLIP and the aesthetic head."""
