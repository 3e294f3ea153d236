// Runs a model that `gpt2 export --to onnx` has written, in this page, and shows its text token by token.
// Nothing is loaded from another host: the library is in node_modules, the model in models/.
import { AutoModelForCausalLM, AutoTokenizer, TextStreamer, env }
  from "./node_modules/@huggingface/transformers/dist/transformers.min.js";

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "models/";
env.backends.onnx.wasm.wasmPaths = new URL("node_modules/onnxruntime-web/dist/", document.baseURI).href;

// onnxruntime-web rounds int8 in other places than onnxruntime.
const ROUNDED = "With rounded weights, the ids may differ from those outside of a browser.";

const form = document.querySelector("form");
const button = document.querySelector("button");
const state = document.querySelector("#state");
const output = document.querySelector("output");

// ?model=FOLDER names a folder in models/, and ?dtype=q8 its int8 file.
const query = new URLSearchParams(location.search);
const name = query.get("model") ?? "gpt2-tiny";
const dtype = query.get("dtype") ?? "fp32";

async function generate(tokenizer, model) {
  const inputs = tokenizer(document.querySelector("#prompt").value);
  output.textContent = "";
  const streamer = new TextStreamer(tokenizer, {
    callback_function: (text) => { output.textContent += text; },
  });
  const ids = await model.generate({
    ...inputs, streamer, do_sample: false, max_new_tokens: Number(document.querySelector("#count").value),
  });
  output.dataset.ids = ids.tolist()[0].join(" ");
}

async function run(work, message) {
  button.disabled = true;
  state.textContent = message;
  try {
    await work();
    state.textContent = dtype === "fp32" ? "Ready." : `Ready. ${ROUNDED}`;
  } catch (error) {
    state.textContent = `Error: ${error.message}`;
  }
  button.disabled = false;
}

await run(async () => {
  const tokenizer = await AutoTokenizer.from_pretrained(name);
  const model = await AutoModelForCausalLM.from_pretrained(name, { dtype, device: "wasm" });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run(() => generate(tokenizer, model), "Generating ...");
  });
}, "Loading the model ...");
