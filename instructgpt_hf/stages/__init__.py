"""The three stages and their evaluation, each from settings to a folder with models and stage.json."""
