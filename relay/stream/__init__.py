"""The Redis side: streams, groups, wake-ups and jobs. The only importer of redis."""
