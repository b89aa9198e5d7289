"""What a compiled step would do on devices that need not be there."""
