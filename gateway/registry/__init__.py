"""Who may connect: the SQL registry of realms, devices and credentials, and its replica on every node.

`store` writes the registry, `feed` reads what changed, `follower` carries changes into the `replica`, and workers
look identities up in the replica alone. Only `store`, `feed`, `follower`, `migrate` and `database` know SQL.
"""
