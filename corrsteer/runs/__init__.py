"""What a collection leaves behind, and how it is collected."""
