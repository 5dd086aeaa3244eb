#!/bin/bash
# The start of one node: its own number and address, the data directory on the first start, then Kafka as process 1.
set -euo pipefail
properties=/tmp/server.properties
{
    cat /etc/kafka-config/server.properties
    echo "node.id=$NODE_ID"
    printf 'advertised.listeners='
    echo "PLAINTEXT://$POD_NAME.kafka.observability:9092,CONTROLLER://$POD_NAME.kafka.observability:9093"
} > "$properties"
"$KAFKA_HOME/bin/kafka-storage.sh" format --ignore-formatted --cluster-id "$CLUSTER_ID" --config "$properties"
exec "$KAFKA_HOME/bin/kafka-server-start.sh" "$properties"
