"""A Ray cluster of processes of this machine: a head that runs no job, and two machines of one processor each.

``python ray_cluster.py`` prints its address, and then the process id of each machine's raylet. It ends with its
standard input.
"""

import sys


def main() -> None:
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False} | small)
    raylets = [cluster.add_node(num_cpus=1, **small).all_processes["raylet"][0].process.pid for _ in range(2)]
    print(cluster.address, *raylets, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
