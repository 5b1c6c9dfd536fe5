#!/bin/sh
# success, failed or running: state of a Job by name. A job that is gone has failed; a kubectl that
# gets no answer says nothing about the job.
answer=$(kubectl ${CAP4D_K8S_NAMESPACE:+--namespace "$CAP4D_K8S_NAMESPACE"} get job "$1" \
  -o 'jsonpath={.status.succeeded}/{.status.failed}' 2>&1)
case $answer in
  1/*) echo success ;;
  */[1-9]* | *NotFound*) echo failed ;;
  *) echo running ;;
esac
