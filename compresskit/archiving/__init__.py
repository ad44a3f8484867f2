"""The pack stage: a folder as one smaller file, without loss."""
