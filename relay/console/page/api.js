// The admin API. All requests go to relay itself, with the session's cookie.

let csrf = "";

export class ApiError extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export function setToken(token) {
  csrf = token;
}

// Keep integers that are too large for a double as they were sent.
function asSent(_key, value, context) {
  const large = typeof value === "number" && !Number.isSafeInteger(value) && Number.isInteger(value);
  return large && context?.source && JSON.rawJSON ? JSON.rawJSON(context.source) : value;
}

async function send(path, options) {
  let response;
  try {
    response = await fetch(`api/${path}`, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "unreachable", "Relay is unreachable.");
  }
  const text = await response.text();
  let answer = {};
  try {
    answer = JSON.parse(text, asSent);
  } catch {
    // A proxy's error page, for example.
  }
  if (response.ok) return answer;
  const { code = String(response.status), message = `Unexpected status ${response.status}` } =
    answer.error ?? {};
  if (response.status === 401 && path !== "login") dispatchEvent(new Event("console:login"));
  throw new ApiError(response.status, code, message);
}

// Values that are null or "" are omitted; an array repeats the parameter.
export function get(path, parameters = {}, signal = undefined) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    for (const each of [value].flat()) {
      if (each !== null && each !== undefined && each !== "") query.append(name, each);
    }
  }
  const text = query.toString();
  return send(text ? `${path}?${text}` : path, { signal });
}

export function post(path, body = {}) {
  return send(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-CSRF-Token": csrf },
    body: JSON.stringify(body),
  });
}
