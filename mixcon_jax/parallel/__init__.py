"""How work is shared out over devices: the mesh, where arrays lie on it, what each device computes apart."""
