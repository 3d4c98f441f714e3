"""What every stage of a run will read and write, held against its settings before any model is loaded."""
