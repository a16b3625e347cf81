override rows: u32;
override columns: u32;
@group(0) @binding(0) var<storage, read> q_weight: array<u32>;
@group(0) @binding(1) var<storage, read> q_scale: array<u32>;  // two float16 in each
@group(0) @binding(2) var<storage, read> inputs: array<f32>;
@group(0) @binding(3) var<storage, read_write> outputs: array<f32>;

fn weight(row: u32, column: u32) -> f32 {
    let groups = (columns + 31) / 32;
    let nibble = (q_weight[row * groups * 4 + column / 8] >> (column % 8 * 4)) & 15;
    let group = row * groups + column / 32;
    return (f32(nibble) - 7) * unpack2x16float(q_scale[group / 2])[group % 2];
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x < rows) {
        var sum = 0.0;
        for (var column = 0u; column < columns; column++) {
            sum += weight(id.x, column) * inputs[id.y * columns + column];
        }
        outputs[id.y * rows + id.x] = sum;
    }
}
