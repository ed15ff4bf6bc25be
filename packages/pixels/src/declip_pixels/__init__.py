"""Pictures to views: decode, crop and resize, compiled where it can be."""
