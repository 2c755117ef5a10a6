"""Behind ``mixcon analyze``: what a checkpoint's features are like."""
