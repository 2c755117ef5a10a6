"""Behind ``mixcon watch``: reading runs as they grow, and drawing them in characters."""
