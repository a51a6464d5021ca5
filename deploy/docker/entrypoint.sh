#!/bin/sh
# Starts the server with the arguments of `docker run`. SageMaker gives the one argument "serve" and tells the
# rest by its variables.
set -eu
if [ "${1:-}" = serve ]; then
  shift
  set -- \
    --allow-sagemaker=true --allow-http=false --allow-grpc=false --allow-openai=false \
    --sagemaker-port="${SAGEMAKER_BIND_TO_PORT:-8080}" \
    --model-repository="${SAGEMAKER_MODEL_REPOSITORY:-/opt/ml/model}" \
    --model-control-mode=explicit --load-model="${SAGEMAKER_DEFAULT_MODEL_NAME:-*}" "$@"
fi
exec enginehouse serve "$@"
