#!/bin/bash
# The topic of the spans. Partitions bound the number of samplers and are not changed later: the hash of a trace id
# would lead to another one. retention.ms is the longest outage of all samplers that is survived, and the most that is
# read again.
set -euo pipefail
exec "$KAFKA_HOME/bin/kafka-topics.sh" \
    --bootstrap-server kafka-0.kafka.observability:9092,kafka-1.kafka.observability:9092 \
    --create --if-not-exists --topic otlp_spans --partitions 24 --replication-factor 3 \
    --config min.insync.replicas=2 --config retention.ms=14400000 --config max.message.bytes=10485760
