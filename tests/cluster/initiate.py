"""Makes the mongod at an address the only member of the replica set `midge`, and waits until it takes writes."""

import sys

from pymongo import MongoClient

address = sys.argv[1]
members = [{"_id": 0, "host": address}]
MongoClient(address, directConnection=True).admin.command("replSetInitiate", {"_id": "midge", "members": members})
MongoClient(address, replicaSet="midge").admin.command("ping")
