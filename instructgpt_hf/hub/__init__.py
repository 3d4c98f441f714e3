"""Cards and publishing. Everything here reads `stage.json`; nothing loads a model."""
