#!/bin/sh
# Ends Jobs by name, and their pods; does not wait for them.
exec kubectl ${CAP4D_K8S_NAMESPACE:+--namespace "$CAP4D_K8S_NAMESPACE"} delete job "$@" \
  --ignore-not-found --wait=false
