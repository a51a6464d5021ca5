// Asks a model over gRPC, once and as a stream. Usage: node infer.js HOST:PORT MODEL INPUT [MODEL INPUT]
// The first model gets FP32 [1, 4] and one answer; the second, decoupled, INT32 [3] and a stream of them.

"use strict";

const path = require("path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const protos = path.join(__dirname, "..", "..", "..", "protos");
const definition = loader.loadSync("grpc_service.proto", { includeDirs: [protos], keepCase: true });
const { inference } = grpc.loadPackageDefinition(definition);

function floats(...values) {
  const buffer = Buffer.alloc(4 * values.length);
  values.forEach((value, index) => buffer.writeFloatLE(value, 4 * index));
  return buffer;
}

function integers(...values) {
  const buffer = Buffer.alloc(4 * values.length);
  values.forEach((value, index) => buffer.writeInt32LE(value, 4 * index));
  return buffer;
}

function request(model, input, datatype, shape, data) {
  return { model_name: model, inputs: [{ name: input, datatype, shape }], raw_input_contents: [data] };
}

function inferOnce(client, model, input) {
  return new Promise((resolve, reject) => {
    client.ModelInfer(request(model, input, "FP32", [1, 4], floats(1, 2, 3, 4)), (error, answer) => {
      if (error) return reject(error);
      const raw = answer.raw_output_contents[0];
      resolve([0, 4, 8, 12].map((offset) => raw.readFloatLE(offset)));
    });
  });
}

function inferStream(client, model, input) {
  return new Promise((resolve, reject) => {
    const values = [];
    const call = client.ModelStreamInfer();
    call.on("data", (answer) => {
      if (answer.error_message) return reject(new Error(answer.error_message));
      values.push(answer.infer_response.raw_output_contents[0].readInt32LE(0));
    });
    call.on("error", reject);
    call.on("end", () => resolve(values));
    call.write(request(model, input, "INT32", [3], integers(7, 8, 9)));
    call.end();
  });
}

async function main([address, model, input, streamed, streamedInput]) {
  const client = new inference.GRPCInferenceService(address, grpc.credentials.createInsecure());
  console.log(JSON.stringify(await inferOnce(client, model, input)));
  if (streamed) console.log(JSON.stringify(await inferStream(client, streamed, streamedInput)));
  client.close();
}

main(process.argv.slice(2)).catch((error) => {
  console.error(error.message);
  process.exit(1);
});
