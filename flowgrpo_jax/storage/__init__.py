"""Reading and writing on disks and in buckets: files, metrics, pictures, encoded prompts."""
