"""Model cards and uploads to the Hub, from `stage.json` and files on disk. Nothing here loads a model."""
