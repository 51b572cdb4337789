"""More processes than one: classes sharded over a device mesh, rows shared by ranks."""
