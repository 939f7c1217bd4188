// Files that were chosen or dropped: which of them the server reads. It reads their contents, as it does for a folder.

/** Why a file is not sent; empty if it is. `limits` are those of /page/settings.json. */
export function refusalOf(file, path, limits) {
  const isKnown = limits.file_types.some((type) => path.toLowerCase().endsWith(type));
  if (!isKnown) return "files of this type cannot be read";
  if (!file.size) return "it is empty";
  if (file.size > mostBytes(limits)) {
    return `it is larger than this server takes (${megabytes(limits.max_body_bytes)}; its setting is max_body_bytes)`;
  }
  return "";
}

/** Whether a file is in a folder that is left out of folders, such as `.git`, or is itself left out. */
export function isLeftOut(path, excluded) {
  const parts = path.split("/");
  return excluded.some((pattern) => {
    const folder = pattern.endsWith("/") ? pattern.slice(0, -1) : "";
    return folder ? parts.slice(0, -1).includes(folder) : pattern === ".*" && parts.some((part) => part.startsWith("."));
  });
}

/** The largest file that fits into a request. */
export function mostBytes({ max_body_bytes: most }) {
  return most - 4096; // the form around it
}

function megabytes(count) {
  return `${(count / 1e6).toLocaleString("en", { maximumFractionDigits: 1 })} MB`;
}

/** All dropped files, including those inside dropped folders, as [file, path] pairs. */
export async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files].map((file) => [file, file.name]);
  const results = [];
  const walk = async (entry, path) => {
    if (entry.isFile) {
      results.push([await new Promise((resolve, reject) => entry.file(resolve, reject)), path]);
      return;
    }
    const reader = entry.createReader();
    for (;;) {
      // A reader returns part of a folder at a time, and an empty list at the end.
      const part = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!part.length) return;
      for (const inside of part) await walk(inside, `${path}/${inside.name}`);
    }
  };
  for (const entry of entries) await walk(entry, entry.name);
  return results;
}
