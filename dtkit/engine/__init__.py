"""What runs on the ranks. The driver names these modules by string and never imports them."""
