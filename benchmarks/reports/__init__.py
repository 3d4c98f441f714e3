"""Printed summary, documentation table and picture of each script's result file."""
