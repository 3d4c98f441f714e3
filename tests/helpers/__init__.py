"""What several test files share, imported as `helpers.<module>`; scripts among them run in processes of their own."""
