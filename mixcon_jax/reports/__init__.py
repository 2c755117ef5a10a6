"""What `mixcon report` is made of: runs -> arms -> comparison -> tables and figures."""
